"""What a recipe needs of GPUs, worked out before anything is started."""
