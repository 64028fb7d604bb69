"""Inside the toolkits that people use already: one module a toolkit, each over the face and imported by name.

``import fastlora`` imports none of them, and none of their packages. ``fastlora info`` says which can be used.
"""
