"""`python -m icl_ft_fast.cli`."""

import sys

from icl_ft_fast.cli import main

sys.exit(main())
