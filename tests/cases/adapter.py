SETTINGS = [
    {"kind": "houlsby", "reduction": 4},
    {"kind": "pfeiffer", "reduction": 5},
    {"kind": "parallel", "reduction": 3},
]
