"""dd2 own-data: from a folder of images to a measured one-step generator, sizes and iterations chosen by what there is."""
