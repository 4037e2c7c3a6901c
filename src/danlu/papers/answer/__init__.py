"""Six fixed questions about a paper, answered from its full text: by quotes, by a model elsewhere, or by one here."""
