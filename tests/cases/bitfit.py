SETTINGS = [
    {"variant": "all"},
    {"variant": "query_intermediate"},
    {"norm": "none"},
    {"norm": "scale_and_shift"},
]
