"""Images to train on: folders and zips of CLASS/IMAGE files, MNIST's files, the embedded digits, and their code ids."""
