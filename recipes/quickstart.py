"""`prefopt quickstart` from a checkout; what it does and all of its settings: prefopt/quickstart.py.

python recipes/quickstart.py                                        # offline, no key, no GPU
python recipes/quickstart.py --judge anthropic:claude-sonnet-5-5 --max_usd 5   # Claude judges
"""

from prefopt.cli import run_recipe
from prefopt.quickstart import Quickstart

if __name__ == "__main__":
    raise SystemExit(run_recipe(Quickstart))
