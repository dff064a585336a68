"""python -m trainer.report: the same as trainer.report.main."""

import sys

from trainer.report import main

sys.exit(main())
