"""Graph metanetworks: weights as graphs, and message passing over them."""

from weightspace.models.graph._config import GraphConfig
from weightspace.models.graph._convert import from_graph, join, to_graph
from weightspace.models.graph._layer import GraphLayer
from weightspace.models.graph._network import GraphNetwork
from weightspace.models.graph._options import ACTIVATIONS, EDGE_ROLES, NODE_ROLES, GraphOptions
from weightspace.models.graph._plan import EdgeSet, GraphPlan, NodeSet, Place
from weightspace.models.graph._planning import graph_plan
from weightspace.models.graph._probed import ProbedGraphNetwork

__all__ = [
    "ACTIVATIONS",
    "EDGE_ROLES",
    "NODE_ROLES",
    "EdgeSet",
    "GraphConfig",
    "GraphLayer",
    "GraphNetwork",
    "GraphOptions",
    "GraphPlan",
    "NodeSet",
    "Place",
    "ProbedGraphNetwork",
    "from_graph",
    "graph_plan",
    "join",
    "to_graph",
]
