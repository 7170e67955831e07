{{- /* What a part speaks: `as` of its template, else gRPC. */ -}}
{{- define "backpack.speaks" -}}
{{- $grpc := dict "name" "grpc" "protocol" (ternary "" "kubernetes.io/h2c" (not (empty .root.Values.tls.secret))) "route" "GRPCRoute" "value" "grpcRoute" }}
{{- toYaml (.as | default $grpc) }}
{{- end }}

{{- /* The Service of a part for those who call it: its port, and (`metrics`) that of metrics. */ -}}
{{- define "backpack.service" -}}
{{- $service := .values.service }}
{{- $speaks := include "backpack.speaks" . | fromYaml }}
apiVersion: v1
kind: Service
metadata:
  name: {{ include "backpack.name" . }}
  labels: {{- include "backpack.labels" . | nindent 4 }}
  {{- include "backpack.annotations" (merge (dict "own" $service.annotations) .) | nindent 2 }}
spec:
  {{- if or (ne $service.type "ClusterIP") (ne .part "interventions") }}
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
    - {name: {{ $speaks.name }}, port: {{ .port }}, targetPort: {{ $speaks.name }}{{ with $service.nodePort }}, nodePort: {{ . }}{{ end }}{{ with $speaks.protocol }}, appProtocol: {{ . }}{{ end }}}
    {{- if .metrics }}
    - {name: metrics, port: 9464, targetPort: metrics}
    {{- end }}
{{- end }}

{{- /* Ways in from outside the cluster, by an Ingress or by the Gateway API. */ -}}
{{- define "backpack.outside" -}}
{{- $service := include "backpack.name" . }}
{{- $port := .port }}
{{- $speaks := include "backpack.speaks" . | fromYaml }}
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
            backend: {service: {name: {{ $service }}, port: {name: {{ $speaks.name }}}}}
    {{- else }}
    {{- fail (printf "%s.ingress.hosts is empty: an Ingress needs the name that clients call" $.at) }}
    {{- end }}
{{- end }}
{{- end }}
{{- with get .values $speaks.value }}
{{- if .enabled }}
---
apiVersion: gateway.networking.k8s.io/v1
kind: {{ $speaks.route }}
metadata:
  name: {{ $service }}
  labels: {{- include "backpack.labels" $ | nindent 4 }}
  {{- include "backpack.annotations" (merge (dict "own" .annotations) $) | nindent 2 }}
spec:
  {{- if not .parentRefs }}
  {{- fail (printf "%s.%s.parentRefs is empty: a %s needs the Gateway that it belongs to" $.at $speaks.value $speaks.route) }}
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
