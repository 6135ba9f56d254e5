"""The all-pairs consistency loss, its terms as pure functions, and how they are evaluated."""
