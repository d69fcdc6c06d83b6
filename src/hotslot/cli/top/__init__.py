"""`hotslot top`: what a running service's swappers are doing, read from the metrics that it exposes.

`scrape` has the text of an address; `readings` makes numbers of it, and rates of two of them; `screen` draws them. The
service is another process, maybe on another machine: what it answers is a stranger's text, bounded and checked.
"""

from .run import run_top
from .scrape import metrics_url

__all__ = ["metrics_url", "run_top"]
