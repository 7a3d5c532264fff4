"""What the paper compares with: independent tokens, the teacher without its last steps, and Distilled Decoding 1.

Each stands on what is below it, and nothing below knows it: importing this package adds DD1's network to those that folders can
hold.
"""

from dd2.baselines.dd1 import student as student  # registers itself
