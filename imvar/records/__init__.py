"""How images were made: records of calls, written into image files and read from them."""
