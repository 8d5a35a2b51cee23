"""Data sets of images, and the random crops and views of them that models train on."""
