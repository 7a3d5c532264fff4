"""Teachers: pre-trained AR models behind one interface."""
