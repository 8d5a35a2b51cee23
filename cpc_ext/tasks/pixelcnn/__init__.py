"""PixelCNNs, plain, gated and ++."""
