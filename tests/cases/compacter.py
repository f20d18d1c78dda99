# 24 wide. A starts larger than published: at 1e-4, three steps of SGD hardly leave the start.
SETTINGS = [
    {"reduction": 3, "rule_std": 0.1},
    {"n": 2, "rank": 2, "reduction": 4, "attention": False, "norms": False, "rule_std": 0.1},
]
