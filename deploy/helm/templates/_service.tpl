{{- /* The Service of a part for those who call it: its gRPC port, and (`metrics`) that of metrics. */ -}}
{{- define "backpack.service" -}}
{{- $service := .values.service }}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "backpack.name" . }}
  labels: {{- include "backpack.labels" . | nindent 4 }}
  {{- include "backpack.annotations" (merge (dict "own" $service.annotations) .) | nindent 2 }}
spec:
  {{- if or (ne $service.type "ClusterIP") (eq .part "gateway") }}
  type: {{ $service.type }}
  {{- end }}
  {{- range $name := list "loadBalancerClass" "loadBalancerSourceRanges" "externalTrafficPolicy" }}
  {{- with get $service $name }}
  {{- if eq $service.type "ClusterIP" }}
  {{- fail (printf "%s.service: %s is of a service of type LoadBalancer or NodePort, not ClusterIP" $.at $name) }}
  {{- end }}
  {{ $name }}: {{ toJson . }}
  {{- end }}
  {{- end }}
  selector: {{- include "backpack.selector" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ .port }}, targetPort: grpc{{ with $service.nodePort }}, nodePort: {{ . }}{{ end }}{{ if not .root.Values.tls.secret }}, appProtocol: kubernetes.io/h2c{{ end }}}
    {{- if .metrics }}
    - {name: metrics, port: 9464, targetPort: metrics}
    {{- end }}
{{- end }}

{{- /* Ways in from outside the cluster, by an Ingress or by the Gateway API. */ -}}
{{- define "backpack.outside" -}}
{{- $service := include "backpack.name" . }}
{{- $port := .port }}
{{- with .values.ingress }}
{{- if .enabled }}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ $service }}
  labels: {{- include "backpack.labels" $ | nindent 4 }}
  {{- include "backpack.annotations" (merge (dict "own" .annotations) $) | nindent 2 }}
spec:
  {{- with .className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- with .tls }}
  tls: {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    {{- range .hosts }}
    - host: {{ . | quote }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend: {service: {name: {{ $service }}, port: {name: grpc}}}
    {{- else }}
    {{- fail (printf "%s.ingress.hosts is empty: an Ingress needs the name that clients call" $.at) }}
    {{- end }}
{{- end }}
{{- end }}
{{- with .values.grpcRoute }}
{{- if .enabled }}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata:
  name: {{ $service }}
  labels: {{- include "backpack.labels" $ | nindent 4 }}
  {{- include "backpack.annotations" (merge (dict "own" .annotations) $) | nindent 2 }}
spec:
  {{- if not .parentRefs }}
  {{- fail (printf "%s.grpcRoute.parentRefs is empty: a GRPCRoute needs the Gateway that it belongs to" $.at) }}
  {{- end }}
  parentRefs: {{- toYaml .parentRefs | nindent 4 }}
  {{- with .hostnames }}
  hostnames: {{- toYaml . | nindent 4 }}
  {{- end }}
  rules:
    - backendRefs:
        - {name: {{ $service }}, port: {{ $port }}}
      {{- with .filters }}
      filters: {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}
{{- end }}
{{- end }}
