"""The processes of a run while it goes on: started, watched, restarted, ended. What every launcher shares."""
