"""``python -m fake_card CASES``: see `fake_card.decide`, which imports torch, and so comes after the device."""

import sys

from fake_card import install

if __name__ == "__main__":
    install()
    from fake_card.decide import main

    main(sys.argv[1])
