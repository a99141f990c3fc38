"""The processes of a run: started, asked to stop, waited for, of one version."""
