"""The machines that a run can be predicted for: their memory and, by assumption, their speeds."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
USABLE = 0.92
"""Share of a GPU's memory that a run can fill; the rest goes to the CUDA context, NCCL, workspaces and fragments."""


@dataclass(frozen=True)
class Hardware:
    """What it runs on. The speeds are assumptions unless measured; every time computed from them is a prediction.

    Args:
        name: as printed.
        memory: bytes of one device.
        tflops: peak of one device in the precision trained in, 10^12 operations a second.
        utilisation: share of the peak that training reaches.
        node_bandwidth: bytes a second that a device sends to others of its node, as collectives reach it.
        network_bandwidth: bytes a second that leave a node, all its adapters together.
        per_node: devices of a node.
    """

    name: str
    memory: int
    tflops: float
    utilisation: float = 0.40
    node_bandwidth: float = 300e9
    network_bandwidth: float = 320e9
    per_node: int = 8

    def bandwidth(self, processes: int) -> float:
        """Bytes a second of a ring through all devices.

        Each device's bytes cross its link within the node; those of a node's rings together cross each border between
        nodes once for every device's worth of bytes.
        """
        if processes <= self.per_node:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth)


HARDWARE: dict[str, Hardware] = {
    "h100": Hardware("H100 SXM 80 GB", 80 * 10**9, 989.0),
    "h200": Hardware("H200 SXM 141 GB", 141 * 10**9, 989.0),
    "a100": Hardware("A100 SXM 80 GB", 80 * 10**9, 312.0, node_bandwidth=200e9, network_bandwidth=160e9),
}
"""Data sheets: memory, dense bf16 peak. 40 % of it is assumed. Within a node two thirds of NVLink's 450 (A100: 300) GB/s a
direction; between nodes 80 % of eight 400 (A100: 200) Gb/s adapters."""
