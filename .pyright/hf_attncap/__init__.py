"""For pyright alone: the links beside this file put the folders where installation puts the packages."""
