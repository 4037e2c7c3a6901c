"""A site for skimming every new paper of the chosen subjects: storage, sources, search, answers, pages."""
