"""`beamline load`: puts a server under load and measures it, honestly.

Latency counts from the moment at which a request was meant to be sent, so a slow server cannot thin out the load that
it is measured with; and the generator measures itself, so a slow generator cannot be mistaken for a slow server.
"""
