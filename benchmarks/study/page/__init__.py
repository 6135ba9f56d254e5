"""The page of the study: its tables, contrasts and pictures, made from the results."""
