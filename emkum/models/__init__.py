"""Networks: blocks, backbones, the families they are read from, and what is regressed of them."""
