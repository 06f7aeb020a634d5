"""`srdeploy predict`: photos by the million, from folders to masks."""
