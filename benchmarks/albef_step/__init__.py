"""One training step of ALBEF, twice: written the common way, and by this package; and what it must cost."""
