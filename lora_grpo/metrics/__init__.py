"""What a run says: to its file, to the terminal, to trackers, and as a picture."""

from lora_grpo.metrics.log import RunLog, history, read_metrics
from lora_grpo.metrics.plot import plot_curves, plot_run
from lora_grpo.metrics.quiet import capture_output, quiet_libraries
from lora_grpo.metrics.reporter import Reporter, check_folder

__all__ = [
    "Reporter",
    "RunLog",
    "capture_output",
    "check_folder",
    "history",
    "plot_curves",
    "plot_run",
    "quiet_libraries",
    "read_metrics",
]
