"""Raft as a value you feed and drain: no clock, no socket, no random source of its own (design: Ongaro and Ousterhout).

`node.py` is the algorithm, `log.py` the log it keeps, `tracker.py` what a leader knows of its followers,
`messages.py` every value that crosses its border, `storage.py` the one part that touches a disk. Section
numbers without a name are those of "In Search of an Understandable Consensus Algorithm", extended version.
"""

from cluster.raft.messages import (
    NOBODY,
    ConfChangeRefused,
    Config,
    Entry,
    EntryKind,
    HardState,
    Members,
    Message,
    MessageType,
    NodeId,
    NotLeader,
    Progress,
    ProposalDropped,
    ReadState,
    Ready,
    Role,
    Saved,
    Snapshot,
    Status,
)
from cluster.raft.node import RaftNode

__all__ = [
    "NOBODY",
    "ConfChangeRefused",
    "Config",
    "Entry",
    "EntryKind",
    "HardState",
    "Members",
    "Message",
    "MessageType",
    "NodeId",
    "NotLeader",
    "Progress",
    "ProposalDropped",
    "RaftNode",
    "ReadState",
    "Ready",
    "Role",
    "Saved",
    "Snapshot",
    "Status",
]
