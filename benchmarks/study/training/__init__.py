"""How a cell of the study is trained: the network, the loss that its condition adds, the loop."""
