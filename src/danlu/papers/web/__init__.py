"""The web site: pages, their JSON and feeds, and the application that serves them."""
