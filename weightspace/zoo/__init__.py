"""The zoo: populations of networks in one HDF5 file, and single checkpoints in and out."""

from weightspace.zoo._architectures import spec_of
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
from weightspace.zoo.checkpoints import (
    Difference,
    HeldWeights,
    Network,
    StoredWeights,
    bytes_of,
    check_checkpoint_output,
    differences,
    free_space,
    load_network,
    meta_of,
    open_network,
    save_network,
    write_tensors,
)
from weightspace.zoo.pictures._inrs import render, source_of
from weightspace.zoo.transfer import EXPORTERS, IMPORTERS, ExportReport, ImportReport, export_zoo, import_zoo

__all__ = [
    "EXPORTERS",
    "FORMAT_VERSION",
    "IMPORTERS",
    "SPLITS",
    "Difference",
    "ExportReport",
    "HeldWeights",
    "ImportReport",
    "Network",
    "Population",
    "RowStore",
    "Source",
    "StoredWeights",
    "Zoo",
    "atomic_path",
    "bytes_of",
    "canonical_json",
    "check_checkpoint_output",
    "check_output",
    "content_digest",
    "differences",
    "draw_zoo",
    "export_zoo",
    "free_space",
    "hold_lock",
    "import_zoo",
    "join_finished",
    "join_zoos",
    "largest_change",
    "load_network",
    "lock_holder",
    "meta_of",
    "open_network",
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
    "write_tensors",
]
