"""The table of an adapter's own parts: every rule of capture in every use and mode, every optimizer with every flag."""
