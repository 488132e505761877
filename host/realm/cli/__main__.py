"""``python -m realm.cli``."""

from realm.cli import main

main()
