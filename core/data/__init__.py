"""Images and their descriptions: data sets, folders, list files, the embedded photographs."""
