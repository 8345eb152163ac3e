"""`python -m slicing.report FOLDER [FOLDER ...]`: table and plots of finished runs."""

import sys

from slicing.report.table import main

if __name__ == "__main__":
    sys.exit(main())
