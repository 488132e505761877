;; Is a component. Refused.
(component)
