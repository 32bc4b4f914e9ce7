"""What figures and reports of zoos are made of: networks as columns, panels, pages."""
