"""From trained weights to the deployed graph, and the proof that it is the plain network's."""
