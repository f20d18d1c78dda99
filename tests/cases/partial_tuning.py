SETTINGS = [{"last": 1}]
