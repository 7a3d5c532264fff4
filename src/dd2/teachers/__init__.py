"""Pre-trained AR models behind one interface: over codes (LlamaGen, VAR, tables) and with a velocity head (AR-diffusion)."""
