"""What goes into a model: checked feeds, and how images and lines of JSON become them."""
