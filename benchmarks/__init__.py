"""What stands behind the claims: costs, coverage, a study on photos, pictures, and a recipe for VOC."""
