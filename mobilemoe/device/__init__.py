"""Phones and boards: reached over adb or ssh, with a runner that needs nothing of them but a 64-bit Arm kernel."""
