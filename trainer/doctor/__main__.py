"""python -m trainer.doctor: the same as python -m trainer doctor."""

import sys

from trainer.doctor import main

sys.exit(main())
