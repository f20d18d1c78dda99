SETTINGS = [{"last": 2}]
