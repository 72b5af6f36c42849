"""images → encoder: data, views, the SOP objective, the loop and its monitors."""
