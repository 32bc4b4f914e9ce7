"""The zoo: populations of networks in one HDF5 file, and single checkpoints in and out."""

from weightspace.zoo._architectures import spec_of
from weightspace.zoo._checkpoints import (
    Network,
    check_checkpoint_output,
    load_network,
    load_networks,
    save_network,
)
from weightspace.zoo._compare import largest_change
from weightspace.zoo._files import (
    FORMAT_VERSION,
    atomic_path,
    canonical_json,
    check_output,
    content_digest,
    verify_digest,
)
from weightspace.zoo._join import join_finished, join_zoos
from weightspace.zoo._locks import hold_lock, lock_holder, own_name
from weightspace.zoo._report import report_zoo
from weightspace.zoo._row_store import RowStore
from weightspace.zoo._show import draw_zoo
from weightspace.zoo._where import rows_where
from weightspace.zoo._zoo import SPLITS, Population, Source, Zoo, split_items, stored_weights
from weightspace.zoo.pictures._inrs import render, source_of
from weightspace.zoo.transfer import EXPORTERS, IMPORTERS, ExportReport, ImportReport, export_zoo, import_zoo

__all__ = [
    "EXPORTERS",
    "FORMAT_VERSION",
    "IMPORTERS",
    "SPLITS",
    "ExportReport",
    "ImportReport",
    "Network",
    "Population",
    "RowStore",
    "Source",
    "Zoo",
    "atomic_path",
    "canonical_json",
    "check_checkpoint_output",
    "check_output",
    "content_digest",
    "draw_zoo",
    "export_zoo",
    "hold_lock",
    "import_zoo",
    "join_finished",
    "join_zoos",
    "largest_change",
    "load_network",
    "load_networks",
    "lock_holder",
    "own_name",
    "render",
    "report_zoo",
    "rows_where",
    "save_network",
    "source_of",
    "spec_of",
    "split_items",
    "stored_weights",
    "verify_digest",
]
