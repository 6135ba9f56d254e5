"""The tests, one folder for each room of the package; `support` holds what several of them share."""
