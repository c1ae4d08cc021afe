"""A bundle as it comes from elsewhere: what is checked before any of it is used."""
