"""Floor 1: images and labels of many formats, checked, split and cut into patches."""
